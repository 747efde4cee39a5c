"""Other libraries' types; each file is imported only where its library is in use."""
