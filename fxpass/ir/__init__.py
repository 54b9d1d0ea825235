"""The ground floor: layouts, exchanges, programs and their verifier. Imports nothing above it."""
