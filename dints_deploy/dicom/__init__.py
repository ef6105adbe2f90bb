"""DICOM in and out: the only place that says LPS; everything outside is RAS mm.

In         series    folder, zip or files -> Study of Series     archive   a zip, unpacked within bounds
           bounded   a file's header, within limits              attributes values out of a data set that may lie
           parse     data set -> plane headers                   header    one image plane as its header tells
Gate       gate      plane headers -> GeometryReport             findings  each finding: code, severity, policies
           content   what headers say of the images              place     where the planes lie
           steps     how they follow each other                  regular   a tilted or uneven stack -> regular grid
           inspect   the study as a tree with its reports
Pixels     pixels    planes -> decoded, rescaled stack           decoders, decoder   compressed frames, in processes
           read      Series -> DicomVolume, and a mask back to the source's planes
Out        result    a mask on its way into objects              provenance  what made it, by digests
           objects   what all objects share; how a file appears  uid       UIDs that follow from content
           seg  measure  rtstruct (contour)  capture  refusal    one kind of object each
Check      selfcheck before a file gets its name                 readback  reads objects by none of the writing code
           verify    a written object against zoo and source
Network    listen    a C-STORE listener                      spool     an object while it comes in
           storing   answers C-STORE on its connection       reception what a port takes, from whom, within what limits
           pdata     P-DATA read without copies                  network   send, commit, count
           instance  what one object says of its study
"""
