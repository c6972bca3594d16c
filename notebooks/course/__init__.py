"""What the notebooks share: session, records, charts and sheets, shifted and generated images."""

# What a session prints if it can't get CIFAR-10. notebooks/conftest.py looks for it.
WITHOUT_CIFAR10 = "Continuing with generated stand-in data"
