"""DICOM in and out: the only place that says LPS; everything outside is RAS mm.

series    folder, zip or files -> Study of Series      header    one image plane as read from a header
gate      plane headers -> GeometryReport              findings  each finding: code, severity, what a policy may do
pixels    planes -> decoded, rescaled stack            read      Series -> DicomVolume, and back to the source's planes
"""
