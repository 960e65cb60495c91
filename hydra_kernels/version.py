"""The version of the package, which stored measurements name."""

VERSION = "0.1.0"
