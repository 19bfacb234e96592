"""Commands: parse, call one function, print. No command module imports torch before its command runs."""
