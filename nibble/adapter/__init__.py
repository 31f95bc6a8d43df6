"""The artefact that leaves: adapter folders in the PEFT format."""
