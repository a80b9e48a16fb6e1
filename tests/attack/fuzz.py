"""Coverage-guided fuzzing of a reader (pip install atheris, which has wheels for Linux):

    PYTHONPATH=.:convert:runtime python tests/attack/fuzz.py header CORPUS tests/attack/seeds/header -max_total_time=600

CORPUS is a folder for what reaches new code; what is found is written to crash-*. Readers: those of readers.py.
"""

import sys

import atheris

with atheris.instrument_imports(include=["run_ckpt", "convert_ckpt", "tests.attack.readers"]):
    from tests.attack.readers import feed


def main() -> None:
    reader = sys.argv.pop(1)
    atheris.Setup(sys.argv, lambda data: feed(reader, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
