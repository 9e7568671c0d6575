"""Thin adapters over regimewrap's public names, one module a framework: ``regimewrap.integrations.NAME``."""
