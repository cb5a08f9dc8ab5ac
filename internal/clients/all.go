package clients

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// All are the clients whose settings are known, in the order of the pages.
var All = []Client{
	{ID: "docker", Name: Text{"Docker", "Docker"}, steps: docker},
	{ID: "docker-desktop", Name: Text{"Docker Desktop", "Docker Desktop"}, steps: desktop},
	{ID: "docker-containerd", Name: Text{"Docker 29 and later, for every registry", "Docker 29 及以上，用于所有仓库"}, All: true, steps: dockerHosts},
	{ID: "compose", Name: Text{"Docker Compose", "Docker Compose"}, steps: compose},
	{ID: "containerd", Name: Text{"containerd, Kubernetes", "containerd、Kubernetes"}, All: true, steps: containerd},
	{ID: "nerdctl", Name: Text{"nerdctl", "nerdctl"}, All: true, steps: nerdctl},
	{ID: "podman", Name: Text{"podman, buildah, skopeo", "podman、buildah、skopeo"}, All: true, ByPath: true, steps: podman},
	{ID: "cri-o", Name: Text{"CRI-O", "CRI-O"}, All: true, ByPath: true, steps: crio},
	{ID: "k3s", Name: Text{"k3s", "k3s"}, All: true, steps: k3s},
	{ID: "rke2", Name: Text{"RKE2", "RKE2"}, All: true, steps: rke2},
	{ID: "kind", Name: Text{"kind", "kind"}, All: true, steps: kind},
	{ID: "talos", Name: Text{"Talos Linux", "Talos Linux"}, All: true, steps: talos},
	{ID: "buildkit", Name: Text{"BuildKit, docker buildx", "BuildKit、docker buildx"}, All: true, steps: buildkit},
	{ID: "panel", Name: Text{"NAS and server panels", "NAS 与服务器面板"}, steps: panel},
}

var tryIt = Text{"Try it.", "试一试。"}

func daemon(m Mirror) string {
	is := struct {
		Mirrors []string `json:"registry-mirrors"`
	}{[]string{m.URL}}
	text, _ := json.MarshalIndent(is, "", "  ")
	return string(text) + "\n"
}

// dockerCA has docker trust the mirror's authority. With the containerd image store it
// looks for those of its mirrors in docker.io's folder.
func dockerCA(m Mirror) []Step {
	if m.CA == "" {
		return nil
	}
	dir, hub := "/etc/docker/certs.d/"+m.host(), "/etc/docker/certs.d/docker.io"
	return []Step{{
		Text:     Text{"Let docker trust the mirror's authority.", "让 docker 信任镜像站的证书颁发机构。"},
		Commands: fmt.Sprintf("mkdir -p %s %s\ncp %s %[1]s/ca.crt\ncp %[3]s %[2]s/ca.crt", dir, hub, m.CA),
	}}
}

func docker(m Mirror) ([]Step, error) {
	if m.Strict {
		return nil, ErrStrict
	}
	return append(dockerCA(m),
		Step{
			Text: Text{"Name the mirror; it serves what comes from docker.io. Keep what the file has already.", "填写镜像站地址；它只用于 docker.io 的镜像。请保留该文件中已有的内容。"},
			File: "/etc/docker/daemon.json", Content: daemon(m),
		},
		Step{
			Text:     Text{"Let docker read it.", "让 docker 读取配置。"},
			Commands: "systemctl reload docker",
		},
		Step{Text: tryIt, Commands: "docker pull alpine:3"},
	), nil
}

// trust has the whole machine trust the mirror's authority, where the client has no
// setting for that.
func trust(m Mirror) []Step {
	if m.CA == "" {
		return nil
	}
	return []Step{{Text: Text{
		"First have the machine trust the authority in " + m.CA + ".",
		"请先让本机信任 " + m.CA + " 中的证书颁发机构。",
	}}}
}

func desktop(m Mirror) ([]Step, error) {
	if m.Strict {
		return nil, ErrStrict
	}
	return append(trust(m), []Step{
		{
			Text:    Text{"In Settings, Docker Engine, add this to the JSON, and choose Apply & restart.", "在 Settings（设置）→ Docker Engine 的 JSON 中加入以下内容，然后点击 Apply & restart。"},
			Content: daemon(m),
		},
		{Text: tryIt, Commands: "docker pull alpine:3"},
	}...), nil
}

func compose(m Mirror) ([]Step, error) {
	steps, err := docker(m)
	if err != nil {
		return nil, err
	}
	return append([]Step{{Text: Text{
		"Compose pulls through docker: it needs no settings of its own, and image names in compose.yaml stay as they are.",
		"Compose 通过 docker 拉取镜像：它自身无需设置，compose.yaml 中的镜像名也无需修改。",
	}}}, steps[:len(steps)-1]...), nil
}

// hosts is the hosts.toml of a registry; "": of all.
func hosts(m Mirror, registry string) string {
	var b strings.Builder
	switch {
	case m.Strict:
		// As the server it would be pushed to, too.
		fmt.Fprintf(&b, "server = %q\ncapabilities = [\"pull\", \"resolve\"]\n", m.URL)
		if m.CA != "" {
			fmt.Fprintf(&b, "ca = %q\n", m.CA)
		}
		b.WriteString("\n")
	case registry != "":
		fmt.Fprintf(&b, "server = %q\n\n", origin(registry))
	}
	fmt.Fprintf(&b, "[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", m.URL)
	if m.CA != "" {
		fmt.Fprintf(&b, "  ca = %q\n", m.CA)
	}
	return b.String()
}

func hostsFiles(m Mirror, dir string) []Step {
	if m.Every {
		return []Step{{
			Text: Text{"For every registry that has no folder of its own here; such a folder goes before this one.", "用于此处没有单独目录的所有仓库；单独的目录优先于此设置。"},
			File: dir + "/_default/hosts.toml", Content: hosts(m, ""),
		}}
	}
	steps := make([]Step, 0, len(m.Registries)+2)
	for _, r := range m.Registries {
		registry := r.Name
		steps = append(steps, Step{
			Text: Text{"For " + registry + ".", "用于 " + registry + "。"},
			File: dir + "/" + registry + "/hosts.toml", Content: hosts(m, registry),
		})
	}
	return steps
}

func dockerHosts(m Mirror) ([]Step, error) {
	steps := append([]Step{{Text: Text{
		"With the containerd image store, which new installations of Docker 29 use. Docker reads these at every pull.",
		"适用于使用 containerd 镜像存储的 Docker（Docker 29 的新安装默认如此）。每次拉取时 docker 都会读取这些文件。",
	}}}, hostsFiles(m, "/etc/docker/certs.d")...)
	return append(steps, Step{Text: tryIt, Commands: "docker pull " + m.image()}), nil
}

const (
	certs    = "/etc/containerd/certs.d"
	pluginV1 = "[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"" + certs + "\"\n"
	pluginV2 = "[plugins.\"io.containerd.cri.v1.images\".registry]\n  config_path = \"" + certs + "\"\n"
)

func containerd(m Mirror) ([]Step, error) {
	steps := append(hostsFiles(m, certs),
		Step{
			Text:    Text{"For Kubernetes, tell containerd of the folder once, in /etc/containerd/config.toml (the first line only if the file has none). With containerd 1.6 or 1.7:", "用于 Kubernetes 时，需在 /etc/containerd/config.toml 中指定该目录，只需一次（文件中没有 version 时才加第一行）。containerd 1.6 或 1.7:"},
			Content: "version = 2\n\n" + pluginV1,
		},
		Step{
			Text:    Text{"With containerd 2:", "containerd 2:"},
			Content: "version = 3\n\n" + pluginV2,
		},
		Step{
			Text:     Text{"Then restart it once. Later changes of hosts.toml need no restart.", "然后重启一次。以后修改 hosts.toml 无需重启。"},
			Commands: "systemctl restart containerd",
		},
	)
	return append(steps, Step{Text: tryIt, Commands: "ctr images pull --hosts-dir " + certs + " " + m.image()}), nil
}

func nerdctl(m Mirror) ([]Step, error) {
	return append(hostsFiles(m, certs), Step{Text: tryIt, Commands: "nerdctl pull " + m.image()}), nil
}

// registries is a registries.conf.
func registries(m Mirror) string {
	var b strings.Builder
	for i, r := range m.Registries {
		if i > 0 {
			b.WriteString("\n")
		}
		insecure := ""
		if m.plain() {
			insecure = "insecure = true\n"
		}
		registry, at := r.Name, m.host()+"/"+r.inPath()
		if m.Strict {
			fmt.Fprintf(&b, "[[registry]]\nprefix = %q\nlocation = %q\n%s", registry, at, insecure)
			continue
		}
		fmt.Fprintf(&b, "[[registry]]\nprefix = %q\nlocation = %q\n\n[[registry.mirror]]\nlocation = %q\n%s", registry, registry, at, insecure)
	}
	return b.String()
}

func containersCA(m Mirror) []Step {
	if m.CA == "" {
		return nil
	}
	dir := "/etc/containers/certs.d/" + m.host()
	return []Step{{
		Text:     Text{"Trust the mirror's authority.", "信任镜像站的证书颁发机构。"},
		Commands: fmt.Sprintf("mkdir -p %s\ncp %s %[1]s/ca.crt", dir, m.CA),
	}}
}

const conf = "/etc/containers/registries.conf.d/mirror.conf"

// errNamed is of a client for which every registry has to be named.
var errNamed = errors.New("it has to name registries, and asks others themselves: say which by --for")

func podman(m Mirror) ([]Step, error) {
	if m.Strict && m.Every {
		return nil, errNamed
	}
	return append(containersCA(m),
		Step{
			Text: Text{"These programs read it at every pull.", "这些程序每次拉取时都会读取该文件。"},
			File: conf, Content: registries(m),
		},
		Step{Text: tryIt, Commands: "podman pull " + m.image()},
	), nil
}

func crio(m Mirror) ([]Step, error) {
	if m.Strict && m.Every {
		return nil, errNamed
	}
	return append(containersCA(m),
		Step{
			Text: Text{"The same file as podman's.", "与 podman 使用同一个文件。"},
			File: conf, Content: registries(m),
		},
		Step{Text: Text{"Let CRI-O read it.", "让 CRI-O 读取配置。"}, Commands: "systemctl reload crio"},
		Step{Text: tryIt, Commands: "crictl pull " + m.image()},
	), nil
}

// names are the registries, for clients that take "*" for all.
func (m Mirror) names() []string {
	if m.Every {
		return []string{"*"}
	}
	names := make([]string, 0, len(m.Registries))
	for _, r := range m.Registries {
		names = append(names, r.Name)
	}
	return names
}

func rancher(m Mirror, dir, service string) []Step {
	var b strings.Builder
	b.WriteString("mirrors:\n")
	for _, registry := range m.names() {
		fmt.Fprintf(&b, "  %q:\n    endpoint:\n      - %q\n", registry, m.URL)
	}
	if m.CA != "" {
		fmt.Fprintf(&b, "configs:\n  %q:\n    tls:\n      ca_file: %q\n", m.host(), m.CA)
	}
	steps := []Step{{
		Text: Text{"On every node.", "在每个节点上。"},
		File: dir + "/registries.yaml", Content: b.String(),
	}}
	if m.Strict {
		steps = append(steps, Step{
			Text:    Text{"Without this in " + dir + "/config.yaml the registry itself is still asked last.", "如果 " + dir + "/config.yaml 中没有以下内容，最后仍会访问原始仓库。"},
			Content: "disable-default-registry-endpoint: true\n",
		})
	}
	return append(steps, Step{
		Text:     Text{"Restart it: " + service + " on servers, " + agent(service) + " on agents.", "重启服务：服务器节点为 " + service + "，工作节点为 " + agent(service) + "。"},
		Commands: "systemctl restart " + service + "\n# systemctl restart " + agent(service) + "   (agents)",
	})
}

func agent(service string) string {
	if service == "k3s" {
		return "k3s-agent"
	}
	return "rke2-agent"
}

func k3s(m Mirror) ([]Step, error) { return rancher(m, "/etc/rancher/k3s", "k3s"), nil }

func rke2(m Mirror) ([]Step, error) { return rancher(m, "/etc/rancher/rke2", "rke2-server"), nil }

func kind(m Mirror) ([]Step, error) {
	var b strings.Builder
	b.WriteString("kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\ncontainerdConfigPatches:\n  - |-\n")
	for line := range strings.Lines(pluginV1) {
		b.WriteString("    " + line)
	}
	b.WriteString("nodes:\n  - role: control-plane\n    extraMounts:\n      - hostPath: ./certs.d\n        containerPath: " + certs + "\n        readOnly: true\n")
	if m.CA != "" {
		fmt.Fprintf(&b, "      - hostPath: %s\n        containerPath: %[1]s\n        readOnly: true\n", m.CA)
	}
	steps := hostsFiles(m, "certs.d")
	return append(steps, Step{
		Text: Text{"Mount them into the nodes. Node images of kind 0.27 and later need no patch.", "把它们挂载到各节点。kind 0.27 及以上的节点镜像无需该补丁。"},
		File: "kind.yaml", Content: b.String(),
	}, Step{
		Text:     Text{"Make the cluster.", "创建集群。"},
		Commands: "kind create cluster --config kind.yaml",
	}), nil
}

func talos(m Mirror) ([]Step, error) {
	var b strings.Builder
	b.WriteString("machine:\n  registries:\n    mirrors:\n")
	for _, registry := range m.names() {
		fmt.Fprintf(&b, "      %q:\n        endpoints:\n          - %q\n", registry, m.URL)
		if m.Strict {
			b.WriteString("        skipFallback: true\n")
		}
	}
	steps := []Step{{
		Text: Text{"A patch of the machine configuration.", "机器配置的补丁。"},
		File: "mirror.yaml", Content: b.String(),
	}}
	if m.CA != "" {
		steps = append(steps, Step{Text: Text{
			"Nodes have to trust the mirror's authority: add a TrustedRootsConfig with what " + m.CA + " has.",
			"各节点必须信任镜像站的证书颁发机构：添加内容为 " + m.CA + " 的 TrustedRootsConfig。",
		}})
	}
	return append(steps, Step{
		Text:     Text{"Apply it to the nodes.", "应用到各节点。"},
		Commands: "talosctl patch machineconfig --nodes <node> --patch @mirror.yaml",
	}), nil
}

func buildkit(m Mirror) ([]Step, error) {
	if m.Strict {
		return nil, ErrStrict
	}
	var b strings.Builder
	for _, r := range m.Registries {
		registry := r.Name
		fmt.Fprintf(&b, "\n[registry.%q]\n  mirrors = [%q]\n", registry, m.host())
	}
	switch {
	case m.plain():
		fmt.Fprintf(&b, "\n[registry.%q]\n  http = true\n", m.host())
	case m.CA != "":
		fmt.Fprintf(&b, "\n[registry.%q]\n  ca = [%q]\n", m.host(), m.CA)
	}
	return []Step{
		{
			Text: Text{"The driver docker of buildx uses docker's settings, and not these.", "buildx 的 docker 驱动使用 docker 自己的设置，而不是这里的设置。"},
			File: "buildkitd.toml", Content: strings.TrimPrefix(b.String(), "\n"),
		},
		{
			Text:     Text{"Make a builder with it.", "用它创建构建器。"},
			Commands: "docker buildx create --use --config buildkitd.toml",
		},
	}, nil
}

func panel(m Mirror) ([]Step, error) {
	if m.Strict {
		return nil, ErrStrict
	}
	return append(trust(m), []Step{
		{
			Text: Text{
				"Synology, QNAP, UGREEN, fnOS, ZSpace, iKuai, BaoTa, 1Panel and others have a field for a registry mirror (image accelerator) of Docker Hub in the settings of their container application. It gets this address.",
				"群晖、威联通、绿联、飞牛 fnOS、极空间、爱快、宝塔、1Panel 等，在其容器(Docker)应用的设置中都有 Docker Hub 镜像加速(registry mirror)地址一栏，填入以下地址即可。",
			},
			Content: m.URL + "\n",
		},
		{Text: Text{
			"Where there is no such field, name the mirror in the image: " + m.host() + "/library/alpine:3.",
			"没有这一栏时，可直接在镜像名中写明镜像站：" + m.host() + "/library/alpine:3。",
		}},
	}...), nil
}
