"""Tests of aiockpt.interchange."""
