"""What the notebooks share: session, records, charts and sheets, shifted and generated images."""
