"""The tests. Helpers beside them are imported by their full name: `from tests.docs.readme import render`."""
