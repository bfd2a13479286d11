"""Runs the method somewhere: the only house that knows ray and mlflow."""
