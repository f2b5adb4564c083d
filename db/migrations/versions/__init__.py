"""One file per schema, named after the release that brought it; never edited after a release."""
