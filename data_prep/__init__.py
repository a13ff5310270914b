"""Builds data sets: train.parquet and test.parquet in verl's schema, without overlap, and a manifest.

python -m data_prep.arithmetic --out outputs/data/arithmetic --digits 3
python -m data_prep.gsm8k      --out outputs/data/gsm8k --from ~/copies/gsm8k

arithmetic.py reasoning_gym.py gsm8k.py math.py hellaswag.py    one builder each: a frozen object of arguments
builder.py     the protocol of a builder  selftest.py   right answers must score 1.0, planted wrong ones less
hub_builder.py shared by the builders over Hugging Face data sets
assemble.py    drops duplicates           folder.py     written once, whole or not at all
prepare.py     builders by name, for `data.prepare` of a run's configuration          cli.py   the command line
"""
