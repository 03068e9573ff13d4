"""What head configurations cost under load: one file in, measurements, a fit and a report out."""
