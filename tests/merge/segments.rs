//! Segments that are no blocks: the stem with the first block, two blocks, and cuts of anything.

use depthshrinker::device::Device;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::graph::{Activation, BlockId, BlockState, Graph, GraphBuilder, NodeId, Op, SegmentEnds, SiteId};
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::merge::{MergeOptions, merge, merge_selection, verify_random};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use depthshrinker::shrink::{Mask, Selection, published_mask};

use crate::networks::{BN_EPS, Member, bn, conv};
use crate::reference::{Reference, assert_same, noise, random_model, relative_error};

/// A MobileNetV2 whose first block changes the channels, as the published ones do.
fn mobilenet() -> Graph {
    let options = NetworkOptions {
        stage_strides: Some(vec![1, 2, 1, 2, 1, 1, 1]),
        head_channels: Some(16),
        ..NetworkOptions::new(Shape::new(22, 19, 3), 4)
    };
    build("mobilenetv2-0.35", &options).unwrap()
}

/// What EC's solver enumerates: 171 segments of the 50 convolutions between stem and head, none of which goes on behind a
/// strided block (`docs/methods.md` 2.1).
#[test]
fn the_segments_of_mobilenet_are_those_of_the_published_tables() {
    const BREAKS: [usize; 4] = [5, 11, 20, 41];
    let graph = build("mobilenetv2-1.0", &NetworkOptions::new(Shape::new(224, 224, 3), 10)).unwrap();
    let convs: Vec<NodeId> =
        NodeId::all(graph.nodes.len()).filter(|&id| matches!(graph.nodes[id].op, Op::Conv(_))).collect();
    let segments = graph.segments();
    let published = segments.iter().filter(|segment| {
        let inside: Vec<usize> = (0..convs.len()).filter(|&i| segment.nodes.contains(&convs[i])).collect();
        let (first, last) = (inside[0], inside[inside.len() - 1]);
        first >= 1 && last <= 50 && !BREAKS.iter().any(|&at| first - 1 < at && at < last)
    });
    assert_eq!(published.count(), 171);
    for segment in &segments {
        graph.check_segment(segment).unwrap();
        assert_eq!(graph.segment(&graph.segment_ends(segment)).unwrap(), *segment);
    }
    // The stem and the first block, and two blocks, are among them.
    for (first, last) in [("conv_stem", "blocks.0.0.bn2"), ("blocks.1.1.conv_pw", "blocks.2.0.bn3")] {
        let ends = SegmentEnds { first: first.into(), last: last.into() };
        assert!(segments.contains(&graph.segment(&ends).unwrap()));
    }
}

/// The published masks that drop the stem's activation: merged, D has one 7×7 convolution of stride 2 for stem and first
/// block, K = 1 + 2 + 2·2 (the stem's 3×3, the depthwise 3×3 behind its stride of 2), and all compute what the network
/// without those activations computes.
#[test]
fn masks_that_free_the_stem_merge_exactly() {
    let model = random_model(mobilenet(), 3);
    assert_eq!(model.graph.sites(), 18);
    for (name, stem) in [("a", false), ("d", true), ("e", false)] {
        let mask = published_mask(&format!("mbv2-1.4-ds-{name}")).unwrap();
        assert_eq!((mask.blocks(), mask.kept()[17]), (18, false));
        for padding in [PaddingMode::Reorder, PaddingMode::BorderBias] {
            let linear = linearise(&model, &mask, &Linearise { final_activation: true, padding }).unwrap();
            assert_eq!(linear.graph.sites(), 17);
            let merged = merge(&linear, &MergeOptions { padding }).unwrap();
            assert_same(&linear, &merged, padding, 5);
            verify_random(&linear, &merged, 2, 1).unwrap().check(&merged).unwrap();
            let first = &merged.segments[0];
            let joins = stem && padding == PaddingMode::Reorder;
            assert_eq!(first.name == "conv_stem+blocks.0.0", joins, "{name}: {first:?}");
            if joins {
                assert_eq!((first.kernel, first.stride, &first.blocks[..]), ([7, 7], [2, 2], &[BlockId::new(0)][..]));
                assert_eq!(merged.model.graph.nodes[1].name, "conv_stem+blocks.0.0.conv");
                assert_eq!(merged.model.graph.state(BlockId::new(0)), BlockState::Merged);
            }
            // Freeing again what is free changes nothing, and a mask of blocks alone says nothing of the stem.
            assert_eq!(linearise(&linear, &mask, &Linearise { final_activation: true, padding }).unwrap(), linear);
        }
    }
}

/// With the padding where it was, dropping the stem's activation is what its slope of 1 does.
#[test]
fn the_stem_is_a_site() {
    let model = random_model(mobilenet(), 3);
    let mask = published_mask("mbv2-1.4-ds-a").unwrap();
    let options = Linearise { final_activation: false, padding: PaddingMode::BorderBias };
    let linear = linearise(&model, &mask, &options).unwrap();
    let image = noise(model.graph.input_shape().len(), 4);
    let mut moving = Reference::new(&model);
    moving.slopes = mask.kept().iter().map(|&kept| f64::from(u8::from(!kept))).collect();
    let logits = |network: &Reference| network.values(&image).pop().unwrap();
    let expected = logits(&moving);
    assert_eq!(relative_error(&expected, &logits(&Reference::new(&linear))), 0.0);
    moving.slopes[17] = 0.0;
    assert!(relative_error(&expected, &logits(&moving)) > 1e-3);
}

/// Two blocks: an inverted residual of stride 1 with its skip, and one of stride 2 that pads nothing.
fn two_blocks() -> Graph {
    let mut b = GraphBuilder::new("two", Shape::new(13, 11, 4));
    let mut x = NodeId::INPUT;
    for (block, c_out, stride, pad) in [(0, 4, 1, 1), (1, 6, 2, 0)] {
        let (input, first) = (x, b.next_node());
        let act = Activation { site: Some(SiteId::new(block)), ..Activation::RELU6 };
        for (name, c, member) in [
            ("pw", 4, Member::dense(9, 1, 1, 0)),
            ("dw", 9, Member::depthwise(9, 3, stride, pad)),
            ("pwl", 9, Member::dense(c_out, 1, 1, 0)),
        ] {
            x = b.push(format!("{block}.{name}"), conv(c, &member), &[x]);
            x = b.push(format!("{block}.{name}.bn"), bn(member.c_out, BN_EPS), &[x]);
            if name != "pwl" {
                x = b.activation(act, x);
            }
        }
        if block == 0 {
            x = b.push("0.add", Op::Add, &[input, x]);
        }
        b.block(block.to_string(), input, first);
    }
    x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", 6, 3, x);
    b.finish().unwrap()
}

#[test]
fn a_segment_over_two_blocks_merges_exactly() {
    let model = random_model(two_blocks(), 2);
    for padding in [PaddingMode::Reorder, PaddingMode::BorderBias] {
        let text = r#"{"kept": [0, 0], "segments": [{"first": "0.pw", "last": "1.pwl.bn"}]}"#;
        let selection = Selection::parse("plan.json".as_ref(), text).unwrap();
        let linear = linearise(&model, &selection, &Linearise { final_activation: true, padding }).unwrap();
        let merged = merge_selection(&linear, &selection, &MergeOptions { padding }).unwrap();
        assert_same(&linear, &merged, padding, 5);
        verify_random(&linear, &merged, 3, 1).unwrap().check(&merged).unwrap();
        let [segment] = &merged.segments[..] else { panic!("{:?}", merged.segments) };
        assert_eq!((segment.name.as_str(), segment.kernel, segment.stride), ("0+1", [5, 5], [2, 2]));
        let graph = &merged.model.graph;
        assert_eq!(
            (graph.state(BlockId::new(0)), graph.state(BlockId::new(1))),
            (BlockState::Merged, BlockState::Merged)
        );
        assert!(graph.blocks[0].nodes.is_empty() && graph.blocks[0].segment().is_none());
        assert_eq!(graph.nodes[1].name, "0+1.conv");
        // Both blocks are one part, whose counterpart is the convolution with its activation.
        let map = merged.map_from(&model.graph, &linear.graph);
        let parts = model.graph.counterparts(graph, &map).unwrap();
        assert_eq!(
            (parts.len(), parts[0].blocks.clone(), parts[0].after.nodes.iter().collect::<Vec<_>>()),
            (1, 0..2, [1, 2].map(NodeId::new).to_vec())
        );
    }
    // Block by block it is two convolutions.
    let both = Selection::from(Mask::new(vec![false; 2]));
    let options = Linearise { final_activation: true, padding: PaddingMode::Reorder };
    let linear = linearise(&model, &both, &options).unwrap();
    assert_eq!(merge(&linear, &MergeOptions { padding: PaddingMode::Reorder }).unwrap().segments.len(), 2);
}

#[test]
fn a_selection_reads_what_it_writes_and_old_plans() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.json");
    let ends = SegmentEnds { first: "0.pw".into(), last: "1.pwl.bn".into() };
    let mut selection = Selection::from("0,1".parse::<Mask>().unwrap());
    selection.write(&path).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("segments") && !text.contains("padding"), "{text}");
    (selection.segments, selection.padding) = (vec![ends], Some(PaddingMode::Reorder));
    selection.write(&path).unwrap();
    assert_eq!(Selection::read(&path).unwrap(), selection);
    assert_eq!(Selection::parse(&path, r#"{"kept": [0, 1]}"#).unwrap().keep, selection.keep);
    let message = Selection::parse(&path, r#"{"kept": [0, 2]}"#).unwrap_err().to_string();
    assert!(message.contains("plan.json") && message.contains("0 or 1"), "{message}");
}

/// A cut runs by itself and gives what the value is within the network.
#[test]
fn a_cut_is_a_network_of_its_own() {
    let model = random_model(mobilenet(), 6);
    let graph = &model.graph;
    let image: Vec<f32> = noise(graph.input_shape().len(), 7).into_iter().map(|v| v as f32).collect();
    let forward = |model: &depthshrinker::model::Model, taps: Vec<NodeId>, images: &[f32]| {
        let options = EngineOptions { batch: 1, fusion: Fusion::OnLoad, training: false, taps };
        let mut engine = Engine::new(&Device::Cpu, model, &options).unwrap();
        let mut output = vec![0.0; model.graph.output_shape().len()];
        engine.forward(images).unwrap().read(&mut output).unwrap();
        let taps = engine.options().taps.iter().map(|&tap| engine.tap(tap).unwrap().host().to_vec());
        (output, taps.collect::<Vec<_>>())
    };
    let widen = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    for (first, last) in [("conv_stem", "blocks.0.0.bn2"), ("blocks.1.1.conv_pw", "blocks.2.0.bn3")] {
        let segment = graph.segment(&SegmentEnds { first: first.into(), last: last.into() }).unwrap();
        let cut = model.cut(&segment).unwrap();
        assert_eq!(cut.graph.output_shape(), graph.shapes().unwrap()[segment.output()]);
        assert!(cut.graph.check_classifier().unwrap_err().to_string().contains("classifies nothing"));
        let (_, taps) = forward(&model, vec![segment.input, segment.output()], &image);
        let (alone, _) = forward(&cut, Vec::new(), &taps[0]);
        assert!(relative_error(&widen(&taps[1]), &widen(&alone)) < 1e-5);
    }
    let crossing = SegmentEnds { first: "blocks.1.1.conv_dw".into(), last: "blocks.2.0.bn3".into() };
    assert!(graph.segment(&crossing).unwrap_err().to_string().contains("second entry or exit"));
}
