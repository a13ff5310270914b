"""Prompts from Parquet files in verl's schema or Hugging Face data sets, as an exactly resumable stream.

settings.py     conf/data: what to load; `verl.py` opens it
loader.py       AtroposDataLoader: take / state / restore
mix.py          which prompt stands at which position of the stream (pure arithmetic)
source.py       one weighted source: read -> check -> filter -> tokenise, with counts
parquet.py      reading files, naming the row where one is damaged
schema.py       verl's columns, and the reason a row is bad
hub.py, raw.py  Hugging Face data sets, and their rows turned into verl's
encode.py       chat or plain text -> token ids
evalset.py      the held-out prompts
counts.py       what became of every row;  quarantine.py  the bad ones
fingerprint.py  content hashes;  paths.py  globs and did-you-mean
"""
