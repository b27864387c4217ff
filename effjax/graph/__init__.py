"""Graph methods: message passing, FASTRAIN self-training and GEENI ensembles."""
