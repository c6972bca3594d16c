"""What the notebooks share: session, stored records, figures, shifted and generated images."""
