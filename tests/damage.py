"""What disks, people and other programs do to the files of a run: one random damage at a time.

`damage(random.Random(seed), run_folder)` does it and says what it did. The folder may be local or in a bucket, where nothing
can be of the wrong kind. Every file of the run can be hit; half of the time it is one of the few that a start reads first.
"""

import json
import random
from pathlib import Path

from emo_jax import buckets
from emo_jax.files import AnyPath, absolute_path, copy_tree, remove_tree


def damage(rng: random.Random, run: str | AnyPath) -> str:
    """One damage of a random kind that applies. Returns what was done, with the paths."""
    run = absolute_path(run, "the run")
    kinds = list(FILES + FOLDERS if isinstance(run, Path) else FILES[:-2] + FOLDERS[:-2])
    rng.shuffle(kinds)
    for kind in kinds:
        paths = _files(run) if kind in FILES else _folders(run)
        if not paths:
            continue
        done = kind(rng, run, _choose(rng, run, paths))
        if done:
            return f"{kind.__name__.replace('_', ' ')}: {done}"
    return "nothing: the run has no files"


# ---- of a file; each returns what it did, "" where it does not apply -------------------------------------------------


def flip_bits(rng, run, path):
    content = bytearray(path.read_bytes())
    for at in rng.sample(range(len(content)), min(rng.choice((1, 1, 8, 64)), len(content))):
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))
    return content and _name(run, path)


def overwrite(rng, run, path):
    """A stretch of zeros or of random bytes, as a lost page of a disk."""
    content = bytearray(path.read_bytes())
    if not content:
        return ""
    start, size = rng.randrange(len(content)), rng.choice((16, 512, 4096))
    size = min(size, len(content) - start)
    content[start:start + size] = rng.choice((bytes(size), rng.randbytes(size)))
    path.write_bytes(bytes(content))
    return f"{size} bytes of {_name(run, path)} at {start}"


def truncate(rng, run, path):
    content = path.read_bytes()
    size = rng.choice((0, len(content) // 2, max(len(content) - 1, 0), rng.randint(0, len(content))))
    path.write_bytes(content[:size])
    return size < len(content) and f"{_name(run, path)} to {size} bytes"


def append(rng, run, path):
    more = rng.choice((b"\0" * 300, b"\xff\xfe\n", b"{}\n", b'[1, 2]\n"text"\nnull\n', b'{"step": "7"}\n', rng.randbytes(64)))
    path.write_bytes(path.read_bytes() + more)
    return f"{more[:20]!r} to {_name(run, path)}"


def delete_file(rng, run, path):
    path.unlink()
    return _name(run, path)


def rename_file(rng, run, path):
    target = path.with_name(rng.choice((path.name + ".bak", "x" + path.name, path.name.upper(), "7")))
    if target.exists():
        return ""
    content = path.read_bytes()
    path.unlink()
    target.write_bytes(content)
    return f"{_name(run, path)} to {target.name}"


def swap_files(rng, run, path):
    """With any other, or the one of the same name of another checkpoint."""
    others = [p for p in _files(run) if p != path]
    same = [p for p in others if p.name == path.name]
    other = _choose(rng, run, same if same and rng.random() < 0.7 else others or [path])
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    return first != second and f"{_name(run, path)} and {_name(run, other)}"


def change_json(rng, run, path):
    """A file that stays JSON: a field changed, retyped or deleted. In a file of lines, one of them."""
    path = rng.choice([p for p in _files(run) if p.name in ("metadata", "config.json", "metrics.jsonl")] or [path])
    try:
        lines = path.read_text().splitlines() if path.name == "metrics.jsonl" else [path.read_text()]
        at = rng.randrange(len(lines))
        tree = json.loads(lines[at])
    except ValueError:  # damaged before, or empty
        return ""
    what = _change(rng, tree)
    lines[at] = json.dumps(tree)
    path.write_text("\n".join(lines) + "\n")
    return f"{what} of {_name(run, path)}"


def _change(rng, tree) -> str:
    """Changes something in an object or list, in place."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not keys:
        return "nothing"
    key = rng.choice(keys)
    if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.8:
        return f"{key}.{_change(rng, tree[key])}"
    old = tree.pop(key)
    if rng.random() < 0.25:
        return f"{key} (deleted)"
    values = [None, "7", [], {}, -1, 2.5, 10**30, True]
    if isinstance(old, (int, float)):
        values += [old + 1, old + 1, old * 2, str(old)]
    new = rng.choice(values)
    tree.insert(key, new) if isinstance(tree, list) else tree.update({key: new})
    return f"{key} ({old!r:.40} is {new!r})"


def make_a_folder_of(rng, run, path):
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "file").write_text("?")
    return _name(run, path)


def make_a_link_of(rng, run, path):
    path.unlink()
    path.symlink_to(rng.choice(("nothing", path.name, "/dev/null", ".")))
    return f"{_name(run, path)} to {path.readlink()}"


# ---- of a folder -----------------------------------------------------------------------------------------------------


def delete_folder(rng, run, path):
    remove_tree(path)
    return _name(run, path)


def rename_folder(rng, run, path):
    names = [f"{path.name}.bak", f"0{path.name}", f"{path.name}²", "7x"]
    if path.name.isdecimal():
        names += [str(int(path.name) + 1), str(max(int(path.name) - 1, 0)), "4" * 12, "4" * 30]
    target = path.with_name(rng.choice(names))
    if target.exists():
        return ""
    _move(path, target)
    return f"{_name(run, path)} to {target.name}"


def copy_folder(rng, run, path):
    """A checkpoint under the number of another step, or a part of one in the place of that of another."""
    others = [p for p in _folders(run) if p.name == path.name and p != path]
    if path.name.isdecimal():
        target = path.with_name(str(int(path.name) + rng.choice((1, 2, 4))))
    elif others:
        target = rng.choice(others)
    else:
        return ""
    remove_tree(target)
    copy = {_name(path, p): p.read_bytes() for p in _files(path)}
    for name, content in copy.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    return f"{_name(run, path)} to {_name(run, target)}"


def swap_folders(rng, run, path):
    others = [p for p in _folders(run) if p != path and p.parent != path and path.parent != p and (
        p.name == path.name or p.parent == path.parent)]
    others = [p for p in others if path not in p.parents and p not in path.parents]
    if not others:
        return ""
    other, aside = rng.choice(others), path.with_name("aside")
    _move(path, aside)
    _move(other, path)
    _move(aside, other)
    return f"{_name(run, path)} and {_name(run, other)}"


def add_foreign_files(rng, run, path):
    name = rng.choice(("notes.txt", ".DS_Store", "lost+found", "12", "9.orbax-checkpoint-tmp-1", "²", "00", "-3"))
    target = path / name
    if target.exists():
        return ""
    if isinstance(run, Path) and rng.random() < 0.4:
        target.mkdir()
        target = target / "file"
    target.write_bytes(rng.randbytes(20))
    return _name(run, target)


def make_a_file_of(rng, run, path):
    remove_tree(path)
    path.write_bytes(rng.choice((b"", b"{}", rng.randbytes(50))))
    return _name(run, path)


def empty_folder(rng, run, path):
    remove_tree(path)
    path.mkdir()
    return _name(run, path)


FILES = (flip_bits, overwrite, truncate, append, delete_file, rename_file, swap_files, change_json, change_json,
         make_a_folder_of, make_a_link_of)
FOLDERS = (delete_folder, rename_folder, copy_folder, swap_folders, add_foreign_files, make_a_file_of, empty_folder)


# ---- of local disks and buckets --------------------------------------------------------------------------------------


def _files(folder: AnyPath) -> list:
    if isinstance(folder, Path):
        return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    found = buckets.filesystem(str(folder)).find(str(folder))
    return sorted(folder / name[len(buckets.without_scheme(folder)) + 1:] for name in found)


def _folders(run: AnyPath) -> list:
    """Those below the run's folder that hold a file."""
    return sorted({parent for p in _files(run) for parent in p.parents if run in parent.parents})


def _choose(rng, run, paths):
    """Half of the time one of those that say what a run or a checkpoint is."""
    first = [p for p in paths if len(p.parts) - len(run.parts) <= 3 or p.parent.name in ("meta", "data")]
    return rng.choice(first if first and rng.random() < 0.5 else paths)


def _name(run: AnyPath, path: AnyPath) -> str:
    return str(path)[len(str(run)) + 1:]


def _move(path: AnyPath, target: AnyPath) -> None:
    if isinstance(path, Path):
        path.rename(target)
    else:
        copy_tree(path, target)
        remove_tree(path)
