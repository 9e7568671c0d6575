"""Thin adapters over regimewrap's public names, one module a framework; import one as ``regimewrap.integrations.NAME``."""
