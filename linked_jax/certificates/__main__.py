"""The command line of certificates: `python -m linked_jax.certificates lk_swish --dtype bfloat16`."""

import argparse
import sys

from linked_jax.certificates import DTYPES, certify
from linked_jax.layers import get_activation


def _print_progress(share: float) -> None:
    filled = int(32 * share)
    end = "\r" + " " * 48 + "\r" if share >= 1 else ""
    print(f"\r[{'#' * filled}{'.' * (32 - filled)}] {share:4.0%} ", end=end, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Certify a named activation and print what was found; exit code 1 if it is not linked."""
    parser = argparse.ArgumentParser(
        prog="python -m linked_jax.certificates",
        description="Try every finite value of a dtype: is some member's derivative non-zero, and all finite, at each?",
    )
    parser.add_argument("activation", help="a name such as lk_swish; a wrong name lists them all")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(arguments)
    try:
        link = get_activation(options.activation, 1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    progress = _print_progress if sys.stderr.isatty() else None
    certificate = certify(link, options.dtype, progress=progress)
    print(f"activation       {options.activation}\n{certificate}")
    return 0 if certificate.linked else 1


if __name__ == "__main__":
    sys.exit(main())
