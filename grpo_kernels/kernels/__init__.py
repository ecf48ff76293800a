"""Arithmetic only: one module or folder for each backend, no autograd, no checks of user input."""
