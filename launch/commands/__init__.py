"""The sub-commands of `globallocal`, each a thin layer over another room."""
