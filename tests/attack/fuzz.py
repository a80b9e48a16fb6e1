"""Coverage-guided fuzzing of a reader, from its seeds (pip install atheris, which has wheels for Linux):

    PYTHONPATH=.:convert:runtime python tests/attack/fuzz.py header --seconds 600 --corpus CORPUS

CORPUS, a folder, keeps what reaches new code, for the next time. Stops at the first finding and writes it to crash-* in
the current folder: an error that is not ours, over 2 GiB of memory, or over 5 s for one file. Readers: those of
readers.py. To keep what a run has found, copy some of it to seeds/READER, which the tests replay.
"""

import argparse
import sys
from pathlib import Path

import atheris

# yaml and tomllib are Python: what they branch on counts as new code too.
with atheris.instrument_imports(include=["run_ckpt", "convert_ckpt", "yaml", "tomllib", "tests.attack.readers"]):
    import yaml  # noqa: F401  it is imported late, by huggingface_hub

    from tests.attack.readers import READERS, feed

from tests.attack.mutations import mutate_header, mutate_json

SEEDS = Path(__file__).parent / "seeds"
OF_JSON = ("index", "config", "manifest", "foreign", "records", "sensitivities")
OF_HEADERS = ("header", "statistics")
MAX_NBYTES = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=sorted(READERS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, required=True)
    asked = parser.parse_args()
    asked.corpus.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={asked.seconds}", "-timeout=5", "-rss_limit_mb=2048", f"-max_len={MAX_NBYTES}"]
    mutators = {**dict.fromkeys(OF_JSON, mutate_json), **dict.fromkeys(OF_HEADERS, mutate_header)}
    mutator = mutators.get(asked.reader)
    atheris.Setup(
        [sys.argv[0], *limits, str(asked.corpus), str(SEEDS / asked.reader)],
        lambda data: feed(asked.reader, data),
        **({"custom_mutator": lambda data, size, seed: mutator(data, size, seed, atheris.Mutate)} if mutator else {}),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
