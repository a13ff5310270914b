"""Writes the data sets of a run: verl-schema train.parquet and test.parquet that never overlap, with a manifest.

python -m data_prep.arithmetic --out outputs/data/arithmetic --digits 3
python -m data_prep.gsm8k      --out outputs/data/gsm8k --from ~/copies/gsm8k

arithmetic.py reasoning_gym.py gsm8k.py math.py hellaswag.py    one builder each: a frozen dataclass of arguments
builder.py     what a builder is          selftest.py   its golds must score 1.0, planted wrong answers must not
hub_builder.py what the builders over Hugging Face data sets share
assemble.py    duplicates and overlap     folder.py     written once, whole or not at all
prepare.py     builders by name, for `data.prepare` of a run's configuration          cli.py   the command line
"""
