"""Report §3.3: longer context by base change (ABF) and YaRN, measured by passkey retrieval."""
