"""Prompts from Parquet files in verl's schema or Hugging Face data sets, as an exactly resumable stream.

settings.py     conf/data: what to load; `verl.py` opens it
loader.py       AtroposDataLoader: take / state / restore
mix.py          which prompt stands at which position of the stream (pure arithmetic)
source.py       one weighted source: which of its rows are trained on, with counts
stored.py       the checked rows of a file on disk;  tokens.py  their token ids
cache.py        the folder of both, shared by processes and runs;  progress.py  what is said meanwhile
reading.py      what an entry names;  parquet.py  reading files in pieces, naming the row where one is damaged
schema.py       verl's columns;  rows.py  the reason a row is bad
truth.py        ground truths as text;  unseen.py  parts of the task that the model would not see
hub.py          Hugging Face data sets;  raw.py, pairs.py  their rows turned into verl's
encode.py       chat or plain text -> token ids
evalset.py      the held-out prompts
counts.py       what became of every row;  quarantine.py  the bad ones
fingerprint.py  content hashes;  paths.py  globs and did-you-mean
"""
