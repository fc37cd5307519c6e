"""Settings of every chapter as data: `<chapter>.toml` with tiny, small, full and smoke tables."""
