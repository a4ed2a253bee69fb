"""Pretraining interventions over scored documents: rephrase, refuse, moral."""
