//! Networks side by side: `bench table`.

use std::fs;
use std::path::Path;

use depthshrinker::pipeline::published_networks;
use serde_json::{Value, json};

use super::{bench, check_utilization, folder};

/// Runs `bench table` into `t`, and gives back the rows of `table.json`.
fn table_rows(dir: &Path, args: &[&str]) -> Vec<Value> {
    bench(dir, &["table", "--out", "t"]).args(args).assert().success();
    let file: Value = serde_json::from_str(&fs::read_to_string(dir.join("t/table.json")).unwrap()).unwrap();
    assert_eq!((&file["schema"], &file["complete"]), (&json!(1), &json!(true)), "{file}");
    file["rows"].as_array().expect("rows").clone()
}

/// Every row has its time, its use of the device and its projection, or the reason why there is none.
fn check_published(rows: &[Value]) {
    for row in rows {
        let timed = row["images_per_s"].as_f64().is_some_and(|rate| rate > 0.0);
        let reason = row["error"].as_str().unwrap_or_default();
        let expected = if row["network"].is_null() { "its numbers of channels were never published" } else { "" };
        assert_eq!((timed, reason), (expected.is_empty(), expected), "{row}");
        if timed {
            check_utilization(row);
            for key in ["projected_images_per_s", "projected_as_published"] {
                assert!(row[key].as_f64().unwrap() > 0.0, "{key}: {row}");
            }
        }
    }
}

#[test]
fn published_networks_stand_side_by_side() {
    let dir = folder();
    let rows = table_rows(dir.path(), &["--preset", "published", "--quick", "--device", "cpu", "--project", "v100"]);
    let of = |name: &str, form: &str| {
        rows.iter().find(|row| row["name"] == name && row["form"] == form).unwrap_or_else(|| panic!("{name} {form}"))
    };
    check_published(&rows);
    // As published, rounded down, of MobileNetV2-1.4 and DepthShrinker's models A to F.
    let published =
        [("mobilenetv2-1.4", 630), ("ds-a", 519), ("ds-b", 502), ("ds-c", 492), ("ds-d", 484), ("ds-e", 474)];
    for (name, mflops) in published.into_iter().chain([("ds-f", 415)]) {
        let row = of(name, "as-published");
        let counted = row["counted_mflops"].as_f64().unwrap().floor();
        assert_eq!((counted, row["published_mflops"].as_f64()), (f64::from(mflops), Some(f64::from(mflops))), "{name}");
    }
    assert_eq!(of("ds-f", "deployed")["published_v100"], json!(10804.0));
    // What is really merged takes another number of operations than what the paper timed in its place.
    assert!(of("ds-f", "deployed")["macs"].as_u64() > of("ds-f", "as-published")["macs"].as_u64());
    let page = fs::read_to_string(dir.path().join("t/table.html")).unwrap();
    for part in
        ["1.53× published on a V100", "as published", "class=\"dot c-m", "data:image/svg+xml", "merged: forward layers"]
    {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("NaN") && !page.contains("<script"));
    let lines = fs::read_to_string(dir.path().join("t/table.csv")).unwrap();
    assert_eq!(lines.lines().count(), rows.len() + 1);

    // What has times is not timed again, what has none is tried again.
    let two = ["--only", "uniform-0.35,metapruning-0.35", "--resume", "-q"];
    let again = table_rows(dir.path(), &[&["--preset", "published", "--quick", "--device", "cpu"], &two[..]].concat());
    for after in &again {
        assert_eq!(after["time_us"], of(after["name"].as_str().unwrap(), after["form"].as_str().unwrap())["time_us"]);
    }
    assert_eq!(again.len(), 4);
}

#[test]
fn published_networks_stand_side_by_side_on_the_emulator() {
    let quick = ["--device", "emulator", "--precision", "f32", "--quick", "--project", "v100"];
    let names: Vec<String> = published_networks().into_iter().map(|network| network.name).collect();
    // In two halves at once, since the emulator runs on one thread.
    let half = |first: usize| {
        let (dir, only) = (folder(), names.iter().skip(first).step_by(2).cloned().collect::<Vec<_>>().join(","));
        table_rows(dir.path(), &[&["--preset", "published", "--only", &only][..], &quick].concat())
    };
    let rows: Vec<Value> = std::thread::scope(|scope| {
        let other = scope.spawn(|| half(1));
        [half(0), other.join().expect("the other half")].concat()
    });
    check_published(&rows);
    assert_eq!(rows.len(), 2 * 32);
    let beside: Vec<(f64, f64)> = rows
        .iter()
        .filter(|row| row["form"] == "as-published" && !row["network"].is_null())
        .filter_map(|row| Some((row["published_v100"].as_f64()?, row["projected_as_published"].as_f64()?)))
        .collect();
    assert_eq!(beside.len(), 9);
    // How far what was published is from what counts say, as `docs/v100.md` tells.
    let shares: Vec<f64> = beside.iter().map(|(published, projected)| published / projected).collect();
    assert!(shares.iter().all(|share| (0.57..1.05).contains(share)), "{shares:?}");
}

#[test]
fn networks_side_by_side_on_the_emulator() {
    let dir = folder();
    let four = ["--preset", "published", "--only", "uniform-0.35,metapruning-0.35"];
    let own =
        ["mobilenetv2-0.1", "mobilenetv2-0.1:0,0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0", "mobilenetv2-0.1:1,0", "nonesuch"];
    let quick = ["--device", "emulator", "--quick", "--image", "24", "--project", "V100"];
    let rows = table_rows(dir.path(), &[&four[..], &own, &quick].concat());
    let found: Vec<(&str, &str, &str, bool)> = rows
        .iter()
        .map(|row| {
            let text = |key: &str| row[key].as_str().unwrap();
            (text("name"), text("form"), text("precision"), row["error"].is_null())
        })
        .collect();
    let rows_of = |name, timed| {
        [("as-published", "f32"), ("deployed", "f32"), ("deployed", "f16")].map(|(form, p)| (name, form, p, timed))
    };
    let expected = [(own[0], true), (own[1], true), (own[2], false), (own[3], false)];
    let expected = expected.into_iter().chain([("uniform-0.35", true), ("metapruning-0.35", false)]);
    assert_eq!(found, expected.flat_map(|(name, timed)| rows_of(name, timed)).collect::<Vec<_>>());
    for (name, reason) in [(own[2], "the mask has 2 entries"), (own[3], "unknown network")] {
        let row = rows.iter().find(|row| row["name"] == name).unwrap();
        assert!(row["error"].as_str().unwrap().contains(reason), "{row}");
    }
    for (args, problem) in [
        (&["--preset", "published", "--only", "ds-g"][..], "--only \"ds-g\"; the list has mobilenetv2-1.4"),
        (&["mobilenetv2-0.1", "--project", "gtx"], "--project \"gtx\"; known are V100 SXM2"),
        (&[], "required arguments were not provided"),
        (&[":ds-a"], "expected NET or NET:SELECTION"),
    ] {
        let output = bench(dir.path(), &["table"]).args(args).assert().code(2).get_output().stderr.clone();
        let told = String::from_utf8_lossy(&output).into_owned();
        assert!(told.contains(problem), "{told}");
    }
}
