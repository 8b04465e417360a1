"""Methods with rules of their own at every ReLU: deconvnet, guided backpropagation, guided Grad-CAM."""

from __future__ import annotations

from torch.nn import functional

from kernels.attribution import cam
from pipeline.stages.attribute.methods.plain import summed
from pipeline.stages.attribute.options import Deconvnet, GuidedBackprop, GuidedGradCam
from pipeline.stages.attribute.subject import Attribution, Known, Subject


def deconvnet(subject: Subject, options: Deconvnet, known: Known) -> Attribution:
    """Send the score back, through each ReLU where the incoming signal is positive: R 1(R > 0).

    Zeiler and Fergus, "Visualizing and understanding convolutional networks" (ECCV 2014).
    """
    values = subject.rectified("deconvnet")
    return Attribution(values, summed(values), subject.no_residual)


def guided_backprop(subject: Subject, options: GuidedBackprop, known: Known) -> Attribution:
    """Send the score back, through each ReLU where the incoming signal and the input are positive: R 1(R > 0) 1(x > 0).

    Springenberg et al., "Striving for simplicity: the all convolutional net" (ICLR workshop 2015).
    """
    values = subject.rectified("guided_backprop")
    return Attribution(values, summed(values), subject.no_residual)


def guided_grad_cam(subject: Subject, options: GuidedGradCam, known: Known) -> Attribution:
    """Multiply guided backpropagation by the positive part of Grad-CAM, enlarged bilinearly to the image.

    Selvaraju et al., "Grad-CAM" (ICCV 2017), section 3.2.
    """
    assert known.layer is not None
    guided = subject.rectified("guided_backprop")
    weight = cam.grad_cam(*subject.layer(known.layer)).relu()[:, None]
    values = guided * functional.interpolate(weight, guided.shape[2:], mode="bilinear", align_corners=False)
    return Attribution(values, summed(values), subject.no_residual)
