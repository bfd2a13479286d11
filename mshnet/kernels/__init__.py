"""Computations written for the hardware, each beside a plain version that the tests hold it to."""
