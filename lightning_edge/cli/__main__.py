"""`python -m lightning_edge.cli` is `lightning-edge`, for whoever must use the same interpreter."""

from lightning_edge.cli.entry import main

if __name__ == "__main__":
    main()
