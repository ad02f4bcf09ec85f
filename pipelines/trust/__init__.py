"""Provenance: verification, signatures, bill of materials."""
