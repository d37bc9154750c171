"""Training, in the order in which it is read:

experiment   a config with its data: what training, sampling, evaluating and planning read
facts        what a run takes from its data and keeps in its folder
step         one training step, a pure function
state        all that a step changes
loop         take an experiment, go on from the last checkpoint, step, and say what happens
parallel     the step on all devices
checkpoint   states on disk, written whole or not at all, verified when read
record       what a run's folder says of how it was started
metrics      where the numbers go
preview      the pictures that show how far a training is
sanity       whether a network learns, and uses its conditioning
transfer     starting from the weights of another run
finetune     training on from a published latent model
latents      pictures as latents, for that
"""
