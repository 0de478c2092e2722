"""The contracts: records, artefact files, Arrow and OCSF schemas, dead-letter reasons."""
