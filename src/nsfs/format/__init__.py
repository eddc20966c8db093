"""Parsers and writers of byte formats: bytes in, values out, no IO."""
