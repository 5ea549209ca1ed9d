"""One adapter for each class that DeepSpeed wraps a client optimizer in: all that is known of those classes.

At stage 0 the tensors that a client optimizer steps are whole parameters, or their fp32 masters. ZeRO 1 to 3 hand over
flat fp32 tensors that hold pieces of many parameters, and padding. An optimizer that needs norms of whole parameters,
as LAMB does, adds up its pieces' sums of squares and reduces them over the ranks that have the other pieces;
`Wrapper.shards` says which they are. Pieces are read from DeepSpeed's own records and from memory, never computed from
how DeepSpeed ought to cut.

A fused client optimizer learns from `Wrapper.shards` what its tensors consist of, and takes over unscaling and clipping
by `Wrapper.take_clipping`: DeepSpeed computes the gradient norm, decides on overflow, and would then multiply all
gradients by one factor in a pass of its own (8 bytes per parameter); it hands over the factor instead. The arithmetic
is DeepSpeed's, so the bits of the update are the same.
"""
