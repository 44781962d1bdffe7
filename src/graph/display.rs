//! A readable printout of a graph, one line a node.

use std::fmt;

use super::node::{Graph, Op};
use crate::ops::conv::{Bias, ConvFamily};

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Ok(shapes), Ok(cost)) = (self.shapes(), self.cost()) else {
            return write!(f, "{} (malformed)", self.name);
        };
        writeln!(f, "{}: {} nodes, {} MACs, {} parameters", self.name, self.nodes.len(), cost.macs(), cost.params())?;
        for (id, node) in self.nodes.iter().enumerate() {
            if let Some(block) = self.blocks.iter().find(|b| b.nodes.start == id) {
                writeln!(f, "  block {} ({:?})", block.name, block.state)?;
            }
            let inputs: Vec<String> = node.inputs.iter().map(|i| format!("%{i}")).collect();
            write!(f, "  %{id:<4}{:<28} {:<34}", node.name, format!("{}({})", node.op, inputs.join(", ")))?;
            write!(f, " {:>12}", shapes[id].to_string())?;
            if cost.nodes[id].macs > 0 {
                write!(f, " {:>12} MACs {:>9} params", cost.nodes[id].macs, cost.nodes[id].params)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Input { .. } => write!(f, "input"),
            Op::Conv(conv) => {
                let kind = match conv.family() {
                    ConvFamily::Depthwise => "depthwise",
                    ConvFamily::Pointwise => "pointwise",
                    ConvFamily::Dense => "conv",
                };
                write!(f, "{kind} {}x{}", conv.window.k_h, conv.window.k_w)?;
                if conv.window.stride_h != 1 || conv.window.stride_w != 1 {
                    write!(f, " s{}", conv.window.stride_h.max(conv.window.stride_w))?;
                }
                if conv.groups > 1 && conv.family() != ConvFamily::Depthwise {
                    write!(f, " g{}", conv.groups)?;
                }
                match conv.bias {
                    Bias::None => Ok(()),
                    Bias::Channel => write!(f, " +bias"),
                    Bias::Map => write!(f, " +bias map"),
                }
            }
            Op::BatchNorm(_) => write!(f, "batch_norm"),
            Op::Activation(act) => match act.limit {
                Some(limit) => write!(f, "relu{limit}"),
                None => write!(f, "relu"),
            },
            Op::Add => write!(f, "add"),
            Op::GlobalAvgPool => write!(f, "global_avg_pool"),
            Op::MaxPool { window } => {
                write!(f, "max_pool {}x{} s{}", window.k_h, window.k_w, window.stride_h.max(window.stride_w))
            }
            Op::Linear(_) => write!(f, "linear"),
            Op::Dropout { p } => write!(f, "dropout {p}"),
        }
    }
}
