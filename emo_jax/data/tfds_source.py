"""TensorFlow Datasets by random access (`as_data_source`): needs no TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emo_jax.data.documents import Document, Source, hash_text
from emo_jax.errors import InputError


class TfdsSource(Source):
    """path: a dataset's version folder (…/name/1.0.0), or a name for `tfds.builder`; written as array_record.

    Documents are not checked in advance: an empty one is a document of one token, its end.
    """

    def __init__(self, path: str, split: str, text_field: str, label_field: str):
        import tensorflow_datasets as tfds

        self.name, self.text_field, self.labels = f"{path}:{split}", text_field, []
        try:
            is_folder = Path(path).expanduser().is_dir()
            builder: Any = tfds.builder_from_directory(str(Path(path).expanduser())) if is_folder else tfds.builder(path)
        except Exception as e:  # the many ways of tfds to say that there is no such dataset
            raise InputError(f"data.path={path!r}: no TFDS dataset there: {_first_line(e)}") from None
        splits = list(builder.info.splits)
        if split.partition("[")[0] not in splits:
            raise InputError(f"data.tfds_split={split!r}: the dataset {path} has the splits {splits}")
        features = builder.info.features
        if text_field not in features:
            raise InputError(f"data.text_field={text_field!r}: the dataset {path} has the fields {sorted(features)}")
        self.label_field = label_field if label_field in features else None
        self._default_label = builder.info.name
        try:
            self._records = builder.as_data_source(split)
        except Exception as e:
            raise InputError(f"data.path={path!r}: cannot be read by random access; write the dataset with "
                             f"file_format='array_record' ({_first_line(e)})") from None
        if not len(self._records):
            raise InputError(f"data.path={path!r}: the split {split!r} holds no documents")
        self._label_names = getattr(features[label_field], "names", None) if self.label_field else None
        self.fingerprint = hash_text(builder.info.full_name, split, len(self._records))
        if not isinstance(self._records[0][text_field], (bytes, str)):
            raise InputError(f"data.text_field={text_field!r} of {path} is {features[text_field]!r}; expected text")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Document:
        record = self._records[int(i)]
        try:
            text, label = _text(record[self.text_field]), record.get(self.label_field, self._default_label)
            if self._label_names is not None and not isinstance(label, (bytes, str)):
                label = self._label_names[int(label)]  # a class label
            return Document(text, _text(label), int(i))
        except UnicodeDecodeError as e:
            raise InputError(f"{self.name}: document {i} is not UTF-8 text ({e})") from None


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]
