"""The function of each method. A new method is a file beside this one, a line here, and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipeline.stages.attribute.methods.attention import attention_relevance, rollout
from pipeline.stages.attribute.methods.black_boxes import kernel_shap, lime, rise
from pipeline.stages.attribute.methods.class_maps import cam, grad_cam, grad_cam_pp, hires_cam, layer_cam
from pipeline.stages.attribute.methods.differences import deep_shap, deeplift, linear_shap
from pipeline.stages.attribute.methods.integrated import integrated_gradients
from pipeline.stages.attribute.methods.lrp import lrp
from pipeline.stages.attribute.methods.occlusion import occlusion
from pipeline.stages.attribute.methods.plain import gradient_x_input, saliency, smooth_grad, var_grad
from pipeline.stages.attribute.methods.rectified import deconvnet, guided_backprop, guided_grad_cam
from pipeline.stages.attribute.subject import Attribution

FUNCTIONS: Mapping[str, Callable[..., Attribution]] = {
    "saliency": saliency,
    "gradient_x_input": gradient_x_input,
    "integrated_gradients": integrated_gradients,
    "smooth_grad": smooth_grad,
    "var_grad": var_grad,
    "deconvnet": deconvnet,
    "guided_backprop": guided_backprop,
    "cam": cam,
    "grad_cam": grad_cam,
    "hires_cam": hires_cam,
    "grad_cam_pp": grad_cam_pp,
    "layer_cam": layer_cam,
    "guided_grad_cam": guided_grad_cam,
    "rollout": rollout,
    "attention_relevance": attention_relevance,
    "occlusion": occlusion,
    "lrp": lrp,
    "deeplift": deeplift,
    "deep_shap": deep_shap,
    "linear_shap": linear_shap,
    "lime": lime,
    "kernel_shap": kernel_shap,
    "rise": rise,
}
