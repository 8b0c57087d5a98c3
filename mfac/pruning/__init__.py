"""Pruning: criteria, patterns, schedules, and the engine that every entry point drives."""
