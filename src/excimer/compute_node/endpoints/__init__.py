"""Bytes to orders, and answers to bytes."""
