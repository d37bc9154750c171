"""The mathematics, in the order in which it is read:

process   x_t = alpha(t) x0 + sigma(t) eps
predict   a network's output as a point of the (x0, eps) plane
denoise   a network as (x, t, cond) -> (x0, eps)
guide     a denoiser made of denoisers
refine    what a solver does to an estimate before the move
grid      the times
sample    the move, and the loop over a grid
ode       likelihood and inversion
loss      what training minimises
cascade   super-resolution with noise augmentation
analytic  denoisers in closed form: mixtures, Wiener's filter
local     denoisers in closed form: training pictures, compared whole or by windows

It imports nothing of diffjax but `utils.struct` and `utils.errors`.
"""
