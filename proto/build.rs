//! Compiles the schema without `protoc`, and generates the table of method policies.

use std::{
    borrow::Cow, collections::BTreeMap, env, error::Error, fs, path::PathBuf, time::Duration,
};

use protox::prost_reflect::{
    DescriptorPool, DynamicMessage, ExtensionDescriptor, MethodDescriptor, Value,
    prost_types::{self, method_options::IdempotencyLevel},
};

const FILES: [&str; 9] = [
    "streamer/common/v1/common.proto",
    "streamer/common/v1/method_options.proto",
    "streamer/router/v1/router.proto",
    "streamer/progress/v1/progress.proto",
    "streamer/processor/v1/worker.proto",
    "streamer/connections/v1/connections.proto",
    "streamer/internal/v1/internal.proto",
    "google/longrunning/operations.proto",
    // Error details; included so that clients can decode them through reflection.
    "google/rpc/error_details.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=streamer");
    println!("cargo:rerun-if-changed=google");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_source_info(true).include_imports(true).open_files(FILES)?;
    let compiled = compiler.file_descriptor_set();

    // Reflection serves the public packages only.
    let mut public = compiled.clone();
    public.file.retain(|file| !file.package().starts_with("streamer.internal"));
    for file in &mut public.file {
        file.source_code_info = None;
    }
    fs::write(out.join("public_descriptor.bin"), prost::Message::encode_to_vec(&public))?;

    tonic_prost_build::configure()
        .bytes(".")
        .build_transport(false)
        .codec_path("crate::codec::SmallBufferCodec")
        .compile_fds(compiled)?;

    fs::write(out.join("method_policies.rs"), method_policies(&compiler.descriptor_pool())?)?;
    Ok(())
}

/// Returns the paths and policies of our methods, sorted by path, as a Rust expression for `methods.rs`.
fn method_policies(pool: &DescriptorPool) -> Result<String, Box<dyn Error>> {
    let call_policy = pool.get_extension_by_name("streamer.common.v1.call_policy");
    let call_policy = call_policy.ok_or("option call_policy is not declared")?;
    let mut entries = BTreeMap::new();
    for service in pool.services() {
        if !service.package_name().starts_with("streamer.") {
            continue;
        }
        for method in service.methods() {
            let path = format!("/{}/{}", service.full_name(), method.name());
            let policy = method_policy(&method, &call_policy);
            let policy = policy.map_err(|error| format!("rpc {path}: {error}"))?;
            entries.insert(path, policy);
        }
    }
    let entries = entries.iter().map(|(path, policy)| format!("    ({path:?}, {policy}),\n"));
    Ok(format!("&[\n{}]\n", entries.collect::<String>()))
}

/// Returns the policy of a method as a Rust expression. prost's own types do not contain extensions.
fn method_policy(
    method: &MethodDescriptor,
    call_policy: &ExtensionDescriptor,
) -> Result<String, Box<dyn Error>> {
    let options = method.options();
    // An absent option has the same value as the explicit IDEMPOTENCY_UNKNOWN.
    if !options.has_field_by_name("idempotency_level") {
        return Err("option idempotency_level is required".into());
    }
    let level = field(&options, "idempotency_level")?;
    let level = IdempotencyLevel::try_from(level.as_enum_number().ok_or("not an enum")?)?;
    let declared = options.get_extension(call_policy);
    let declared = declared.as_message().ok_or("call_policy is not a message")?;
    let flag = |name| field(declared, name)?.as_bool().ok_or(format!("{name} is not a bool"));

    let repeatable =
        level != IdempotencyLevel::IdempotencyUnknown || flag("repeatable_by_services")?;
    let retry_if_unavailable = flag("retry_if_unavailable")?;
    if retry_if_unavailable && !repeatable {
        return Err("retry_if_unavailable requires calls that can be repeated".into());
    }
    let timeout = if declared.has_field_by_name("timeout") {
        let timeout = field(declared, "timeout")?;
        let timeout = timeout.as_message().ok_or("timeout is not a message")?;
        let timeout = Duration::try_from(timeout.transcode_to::<prost_types::Duration>()?)?;
        format!("Some(Duration::from_millis({}))", timeout.as_millis())
    } else {
        "None".into()
    };
    let stream_kind = match field(declared, "stream_kind")?.as_enum_number() {
        Some(0) => "Unspecified",
        Some(1) => "Watch",
        Some(2) => "Session",
        _ => return Err("unknown stream_kind".into()),
    };
    if method.is_server_streaming() != (stream_kind != "Unspecified") {
        return Err("stream_kind is required if the response is a stream, and only then".into());
    }
    Ok(format!(
        "MethodPolicy {{ repeatable: {repeatable}, retry_if_unavailable: {retry_if_unavailable}, \
         timeout: {timeout}, stream_kind: StreamKind::{stream_kind} }}"
    ))
}

/// Returns a field of a message, or its default value.
fn field<'a>(message: &'a DynamicMessage, name: &str) -> Result<Cow<'a, Value>, String> {
    message.get_field_by_name(name).ok_or_else(|| format!("{name} is not declared"))
}
