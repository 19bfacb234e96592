"""One operation a file: the plain version first, faster ones after it, one parity test for all."""
