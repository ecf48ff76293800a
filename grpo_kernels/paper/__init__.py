"""The paper's experiment and its theory, behind `reproduce`."""
