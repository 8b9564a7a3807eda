"""Place quantizers in any network: trace it once, decide by a table what each runtime wants, and keep the module."""
