"""The Recon paper as runnable experiments: its numbers as data, its analyses as functions, and fair controls."""
