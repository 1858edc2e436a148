package main

import (
	"fmt"
	"net/netip"
	"sort"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const table = "inet cowhand_netpol"

// snapshot is what the ruleset is a function of.
type snapshot struct {
	pods       []*corev1.Pod
	namespaces []*corev1.Namespace
	policies   []*networkingv1.NetworkPolicy
}

// direction holds what differs between ingress and egress.
type direction struct {
	kind   networkingv1.PolicyType
	prefix string // of the pods' chains
	peer   string // the address of the other side
}

var directions = []direction{
	{networkingv1.PolicyTypeEgress, "e", "ip daddr"},
	{networkingv1.PolicyTypeIngress, "i", "ip saddr"},
}

// rule is one ingress or egress rule of a policy; the API has two types of the same shape.
type rule struct {
	peers []networkingv1.NetworkPolicyPeer
	ports []networkingv1.NetworkPolicyPort
}

// target is a set of peer addresses as an nft match ("" is anyone) and the pods behind it, which
// resolve named ports.
type target struct {
	match string
	pods  []*corev1.Pod
}

// render returns an nft script that replaces the table by the rules of the snapshot. Destination
// addresses are those after the translation of Services, as in other implementations.
func render(s snapshot) string {
	sort.Slice(s.pods, func(i, j int) bool { return key(s.pods[i]) < key(s.pods[j]) })
	sort.Slice(s.policies, func(i, j int) bool { return key(s.policies[i]) < key(s.policies[j]) })
	var chains, maps strings.Builder
	for _, d := range directions {
		var elements []string
		for i, pod := range s.pods {
			if !hasAddress(pod) {
				continue
			}
			rules, isolated := s.rulesFor(pod, d)
			if !isolated {
				continue
			}
			name := fmt.Sprintf("%s%d", d.prefix, i)
			elements = append(elements, pod.Status.PodIP+" : jump "+name)
			fmt.Fprintf(&chains, "\tchain %s { # %s\n\t\t%s %s return\n", name, key(pod), d.peer, pod.Status.PodIP)
			for _, line := range s.lines(rules, pod, d) {
				fmt.Fprintf(&chains, "\t\t%s return\n", line)
			}
			chains.WriteString("\t\tcounter drop\n\t}\n")
		}
		fmt.Fprintf(&maps, "\tmap %s {\n\t\ttype ipv4_addr : verdict\n", d.prefix+"_pods")
		if len(elements) > 0 {
			fmt.Fprintf(&maps, "\t\telements = { %s }\n", strings.Join(elements, ", "))
		}
		maps.WriteString("\t}\n")
	}
	// Traffic from the node to its own pods (probes, the API server) passes neither hook: NetworkPolicy
	// never forbids it. Traffic of pods to the node arrives at the input hook.
	return fmt.Sprintf(`table %[1]s
delete table %[1]s
table %[1]s {
%[2]s%[3]s	chain forward {
		type filter hook forward priority 10; policy accept;
		ct state established,related accept
		ip saddr vmap @e_pods
		ip daddr vmap @i_pods
	}
	chain input {
		type filter hook input priority 10; policy accept;
		ct state established,related accept
		ip saddr vmap @e_pods
	}
}
`, table, chains.String(), maps.String())
}

func key(o metav1.Object) string { return o.GetNamespace() + "/" + o.GetName() }

// hasAddress is false for pods without a network of their own and for those that have ended.
func hasAddress(pod *corev1.Pod) bool {
	address, err := netip.ParseAddr(pod.Status.PodIP)
	return err == nil && address.Is4() && !pod.Spec.HostNetwork &&
		pod.Status.Phase != corev1.PodSucceeded && pod.Status.Phase != corev1.PodFailed
}

// rulesFor returns the rules of all policies that select the pod, and whether there is such a policy.
func (s snapshot) rulesFor(pod *corev1.Pod, d direction) (rules []policyRule, isolated bool) {
	for _, policy := range s.policies {
		if policy.Namespace != pod.Namespace || !matches(&policy.Spec.PodSelector, pod.Labels) {
			continue
		}
		for _, kind := range policy.Spec.PolicyTypes {
			if kind != d.kind {
				continue
			}
			isolated = true
			if kind == networkingv1.PolicyTypeIngress {
				for _, r := range policy.Spec.Ingress {
					rules = append(rules, policyRule{policy.Namespace, rule{r.From, r.Ports}})
				}
			} else {
				for _, r := range policy.Spec.Egress {
					rules = append(rules, policyRule{policy.Namespace, rule{r.To, r.Ports}})
				}
			}
		}
	}
	return rules, isolated
}

// policyRule is a rule with the namespace that its pod selectors mean.
type policyRule struct {
	namespace string
	rule
}

func (s snapshot) lines(rules []policyRule, pod *corev1.Pod, d direction) []string {
	var lines []string
	for _, r := range rules {
		for _, t := range s.targets(r, d) {
			if len(r.ports) == 0 {
				lines = append(lines, strings.TrimSpace(t.match))
			}
			for _, port := range r.ports {
				lines = append(lines, portLines(port, t, pod, d)...)
			}
		}
	}
	return lines
}

// targets resolves the peers of a rule. A selector that matches no pod yields nothing.
func (s snapshot) targets(r policyRule, d direction) []target {
	if len(r.peers) == 0 {
		return []target{{"", s.pods}}
	}
	var targets []target
	for _, peer := range r.peers {
		if block := peer.IPBlock; block != nil {
			if match := blockMatch(block, d); match != "" {
				targets = append(targets, target{match, nil})
			}
			continue
		}
		var pods []*corev1.Pod
		for _, pod := range s.pods {
			if hasAddress(pod) && s.selects(peer, r.namespace, pod) {
				pods = append(pods, pod)
			}
		}
		if match := podsMatch(pods, d); match != "" {
			targets = append(targets, target{match, pods})
		}
	}
	return targets
}

func (s snapshot) selects(peer networkingv1.NetworkPolicyPeer, namespace string, pod *corev1.Pod) bool {
	if peer.NamespaceSelector == nil {
		if pod.Namespace != namespace {
			return false
		}
	} else if !s.namespaceMatches(peer.NamespaceSelector, pod.Namespace) {
		return false
	}
	return peer.PodSelector == nil || matches(peer.PodSelector, pod.Labels)
}

func (s snapshot) namespaceMatches(selector *metav1.LabelSelector, name string) bool {
	for _, namespace := range s.namespaces {
		if namespace.Name == name {
			return matches(selector, namespace.Labels)
		}
	}
	return false
}

func matches(selector *metav1.LabelSelector, set map[string]string) bool {
	s, err := metav1.LabelSelectorAsSelector(selector)
	return err == nil && s.Matches(labels.Set(set))
}

func blockMatch(block *networkingv1.IPBlock, d direction) string {
	prefix, err := netip.ParsePrefix(block.CIDR)
	if err != nil || !prefix.Addr().Is4() {
		return ""
	}
	match := fmt.Sprintf("%s %s", d.peer, prefix.Masked())
	for _, except := range block.Except {
		match += fmt.Sprintf(" %s != %s", d.peer, except)
	}
	return match
}

func podsMatch(pods []*corev1.Pod, d direction) string {
	if len(pods) == 0 {
		return ""
	}
	seen := map[string]bool{}
	var addresses []string
	for _, pod := range pods {
		if !seen[pod.Status.PodIP] {
			seen[pod.Status.PodIP] = true
			addresses = append(addresses, pod.Status.PodIP)
		}
	}
	return fmt.Sprintf("%s { %s }", d.peer, strings.Join(addresses, ", "))
}

// portLines renders one port of a rule. A named port means the port of that name of the pod that
// receives: of this pod for ingress, of each peer for egress.
func portLines(port networkingv1.NetworkPolicyPort, t target, pod *corev1.Pod, d direction) []string {
	protocol := corev1.ProtocolTCP
	if port.Protocol != nil {
		protocol = *port.Protocol
	}
	transport := strings.ToLower(string(protocol))
	line := func(match, ports string) string {
		return strings.TrimSpace(match + " " + transport + " dport " + ports)
	}
	switch {
	case port.Port == nil:
		return []string{strings.TrimSpace(t.match + " meta l4proto " + transport)}
	case port.Port.Type == intstr.Int && port.EndPort != nil:
		return []string{line(t.match, fmt.Sprintf("%d-%d", port.Port.IntVal, *port.EndPort))}
	case port.Port.Type == intstr.Int:
		return []string{line(t.match, fmt.Sprint(port.Port.IntVal))}
	case d.kind == networkingv1.PolicyTypeIngress:
		if number := namedPort(pod, port.Port.StrVal, protocol); number != 0 {
			return []string{line(t.match, fmt.Sprint(number))}
		}
		return nil
	}
	var lines []string
	for _, peer := range t.pods {
		if number := namedPort(peer, port.Port.StrVal, protocol); number != 0 && hasAddress(peer) {
			lines = append(lines, line(podsMatch([]*corev1.Pod{peer}, d), fmt.Sprint(number)))
		}
	}
	return lines
}

// namedPort looks in init containers too: native sidecars serve from there. 0 if there is none.
func namedPort(pod *corev1.Pod, name string, protocol corev1.Protocol) int32 {
	for _, containers := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for _, container := range containers {
			for _, port := range container.Ports {
				if port.Name == name && (port.Protocol == protocol || port.Protocol == "" && protocol == corev1.ProtocolTCP) {
					return port.ContainerPort
				}
			}
		}
	}
	return 0
}
