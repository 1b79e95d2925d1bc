"""Tables of tensor names and hyper-parameters, one file a model family. Data only."""
