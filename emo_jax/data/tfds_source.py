"""TensorFlow Datasets by random access (`as_data_source`): needs no TensorFlow."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import numpy as np

from emo_jax.config import DataConfig
from emo_jax.data.arrayrecord import require_readable
from emo_jax.data.content import content_of_files
from emo_jax.data.documents import Document, Source, UnreadableDocument, hash_text
from emo_jax.data.records import label_of, text_of, tokens_of
from emo_jax.errors import InputError
from emo_jax.files import given_path, list_files


class TfdsSource(Source):
    """path: a dataset's version folder (…/name/1.0.0), or a name for `tfds.builder`; written as array_record.

    Documents are not checked in advance: an empty one is a document of one token, its end.
    """

    def __init__(self, data: DataConfig):
        import tensorflow_datasets as tfds

        path, split = data.path, data.tfds_split
        self.name, self.labels, self._tokens = f"{path}:{split}", [], bool(data.tokens_field)
        self._field, setting = (data.tokens_field, "tokens_field") if self._tokens else (data.text_field, "text_field")
        folder = given_path(path, "data.path")
        require_readable(folder)
        try:
            builder: Any = tfds.builder_from_directory(str(folder)) if folder.is_dir() else tfds.builder(path)
        except Exception as e:  # the many ways of tfds to say that there is no such dataset
            raise InputError(f"data.path={path!r}: no TFDS dataset there: {_first_line(e)}") from None
        splits = list(builder.info.splits)
        if split.partition("[")[0] not in splits:
            raise InputError(f"data.tfds_split={split!r}: the dataset {path} has the splits {splits}")
        features = builder.info.features
        if self._field not in features:
            raise InputError(f"data.{setting}={self._field!r}: the dataset {path} has the fields {sorted(features)}")
        self._label_field, self._default_label = data.label_field, builder.info.name
        try:
            self._records = builder.as_data_source(split)
        except Exception as e:
            raise InputError(f"data.path={path!r}: cannot be read by random access; write the dataset with "
                             f"file_format='array_record' ({_first_line(e)})") from None
        if not len(self._records):
            raise InputError(f"data.path={path!r}: the split {split!r} holds no documents")
        names = getattr(features[data.label_field], "names", None) if data.label_field in features else None
        self._label_names = tuple(names or ())
        self.fingerprint = hash_text(builder.info.full_name, split, len(self._records))
        shards = {path.name for path in map(PurePath, builder.info.splits[split.partition("[")[0]].filepaths)}
        self._listed = [f for f in list_files(str(builder.data_path))[1] if f.path.name in shards]
        if not isinstance(self._records[0][self._field], np.ndarray if self._tokens else (bytes, str)):
            raise InputError(f"data.{setting}={self._field!r} of {path} is {features[self._field]!r}; expected "
                             f"{'token ids' if self._tokens else 'text'}")

    def content_hash(self) -> str:
        return content_of_files(self._listed, self.name)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Document:
        try:
            record = self._records[int(i)]
            value = record[self._field]
            label = label_of(record.get(self._label_field), self._label_field, self._default_label, self._label_names)
            if self._tokens:
                return Document("", label, int(i), tokens_of(value, self._field))
            return Document(text_of(value, self._field) if value else "", label, int(i))
        except (ValueError, RuntimeError) as e:  # the reader raises RuntimeError for a damaged record
            raise UnreadableDocument(f"{self.where(i)}: {_first_line(e)}") from None


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]
